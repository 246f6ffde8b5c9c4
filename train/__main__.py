import sys

from fused_ops.train.main import main

sys.exit(main())
