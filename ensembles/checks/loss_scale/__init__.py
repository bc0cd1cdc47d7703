"""Promise: in the ensemble, every member's gradient is the claimed multiple of its gradient alone.

Catches a mean where the sum of the members' losses is meant (under SGD exactly a training at lr/M
with M times the weight decay), losses of the mean prediction, weights of members that are not as
claimed, parameters that members have in common, where their gradients add up, probabilities that a
loss takes for logits, and clipping by one norm. What follows for rates is compared by
`ensembles.checks.loss_scale.effective_rates`.

"Sum or mean?" decides what a learning rate means. With s the multiple, a step of SGD is
lr (s g + wd w) = (s lr) (g + (wd/s) w), so that s lr and wd/s are the rates of the member alone.
"""
