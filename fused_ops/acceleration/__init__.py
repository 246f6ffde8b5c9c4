"""What stands behind :func:`fused_ops.accelerate`: a file per kind of exchanged module, over shared parts.

- ``flow``: which module's output goes where, by tracing.
- ``exchange``: how a module becomes one that computes a whole chain, and how it becomes itself again.
- ``deferred``: how an addition after a chain joins its operator.
- ``layers``: which stock modules there is an operator for.
- ``depthwise``, ``attention``, ``mlps``, ``conv_mlps``, ``gates``, ``hr_chains``: what is recognised and what
  it becomes.
- ``plan``, ``report``: what could be exchanged, and what was.

An operator can take the place of a module, or of modules that hand on to each other. The co-attention of
DS-Net's public code is neither: its products, softmaxes and their dropout are lines in the middle of a whole
block's forward, between modules that make both streams' inputs and modules that take both results. To put an
operator there is to exchange the block with all else in it, which is ``fused_ops.blocks.ds_block``, with that
code's checkpoints; so there is no rule for it.
"""
