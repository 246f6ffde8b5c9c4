"""``python -m fused_ops COMMAND``: the ``fused-ops`` command."""

from fused_ops.cli import main

raise SystemExit(main())
