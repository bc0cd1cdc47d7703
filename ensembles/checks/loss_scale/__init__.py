"""Every member's gradient is the claimed multiple of its gradient alone, and it trains at the
claimed learning rate.

Catches a mean where the sum of the members' losses is meant (under SGD exactly a training at lr/M
with M times the weight decay), losses of the mean prediction, weights of members that are not as
claimed, parameters that members have in common, where their gradients add up, probabilities that a
loss takes for logits, clipping by one norm, schedules that are stepped once for each member,
absolute rates (eta_min, the start of a warm-up) that do not scale with the learning rate, and a
warm-up of length 0 or of fractional length.

"Sum or mean?" decides what a learning rate means. With s the multiple, a step of SGD is
lr (s g + wd w) = (s lr) (g + (wd/s) w), so that s lr and wd/s are the rates of the member alone.
The multiple is measured by backward passes in train mode: of the loss, and of the member's loss
alone. What the optimizer makes of it is found by experiment: SGD and its relatives are proportional
to the gradient, but Adam and its relatives do not see its scale, except for eps.

Limits: an optimizer that is neither (RAdam, LBFGS) has no effective rates. A loss that draws random
numbers is refused. Effective rates are true of parameters that a member has for itself: where
gradients of several members add up, no single model trains so, and the check says where. The
schedule is looked at for as many steps as are claimed, 100 by default.
"""  # noqa: D205 (the promise takes two lines)
