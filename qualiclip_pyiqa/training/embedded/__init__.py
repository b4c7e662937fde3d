"""Training of the two embedded models on a CPU, see `__main__`.

Both are a `towers.mobile.MobileTower` of one head for quality and one for each look attribute.

- `crops` degrades photographs by one to four types at once and gives each crop a target without opinion scores: the
  mean of judges that are each weak.
- `qualiclip-mini` keeps the pretrained trunk; its quality head is a ridge regression on these targets.
- `qualiclip-mini+` fine-tunes the trunk's later blocks to opinion scores and, so that it does not forget what degraded
  images look like, to the same targets (`opinions`). The earlier blocks stay as they are, so each image passes them
  once (`frozen`).
- `attributes` fits the other heads to degradation ladders. They see the earlier blocks alone, so both models share
  them.
- `windows` adds heads for small windows, by which local quality maps are computed; scores do not depend on them.
"""
