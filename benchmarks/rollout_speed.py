"""A rollout over many checkpoints beside loops over diffusers: see benchmarks/rollout_comparison.py.

python benchmarks/rollout_speed.py --json
python benchmarks/rollout_speed.py --json --parts speed                     # the others: memory, ray, simulator
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts this folder first on its path, where no other package of ours is.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from benchmarks.rollout_comparison import main

    main()
