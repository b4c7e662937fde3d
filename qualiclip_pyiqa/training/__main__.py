"""`python -m qualiclip_pyiqa.training`."""

import sys

from .train import main

sys.exit(main())
