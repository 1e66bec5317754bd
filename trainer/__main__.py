"""`python -m trainer`."""

import sys

from trainer.allocator import keep_freed_memory
from trainer.cli import main

keep_freed_memory()
sys.exit(main())
