"""Members see the samples that they claim to see, in the claimed order.

Catches "bagged" members that all get the same sample indices, bootstraps that are drawn without
replacement, anew in every epoch, or that overlap too much, members claimed paired whose loaders
shuffle by themselves, members claimed shuffled that read in one order, and loaders whose workers
augment with one stream.

A bootstrap draws n of N samples with replacement: N (1 - (1 - 1/N)^n) of them are distinct, for
n = N a share of 1 - 1/e = 63.2 %, and two members have the square of that share in common (Efron
1979, "Bootstrap methods"; Breiman 1996, "Bagging predictors"). Both are compared within six
standard deviations, so that one healthy ensemble in a hundred million is refused. A member keeps
its bootstrap: one that is drawn anew in every epoch has seen all samples after a few.

Limits: samples are known by their index where integers come, and by the digest of their content
where a loader gives batches. Then equal samples count as one, and random augmentation makes every
sample another. Loaders are read one after the other, from one seed, as training would read them.
The streams of workers are looked at where samples are known by their content, with a few samples
of a data set that has indices.
"""
