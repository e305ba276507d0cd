"""Makes the simulation importable as `sim`, and Scheduler's tests short."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
