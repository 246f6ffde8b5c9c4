"""What stands behind :func:`fused_ops.accelerate`: a file per kind of exchanged module, over shared parts.

- ``flow``: which module's output goes where, by tracing.
- ``exchange``: how a module becomes one that computes a whole chain, and how it becomes itself again.
- ``deferred``: how an addition after a chain joins its operator.
- ``layers``: which stock modules there is an operator for.
- ``depthwise``, ``attention``, ``mlps``, ``conv_mlps``, ``gates``: what is recognised and what it becomes.
- ``plan``, ``report``: what could be exchanged, and what was.
"""
