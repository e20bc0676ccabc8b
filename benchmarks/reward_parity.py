"""Our rewards beside the official packages: see benchmarks/reward_comparison.py.

make parity                                                    # sets up both environments, then this
python benchmarks/reward_parity.py --json
python benchmarks/reward_parity.py --hps_v2 HPS_v2.1_compressed.pt --image_reward ImageReward.pt --device cuda
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts this folder first on its path, where no other package of ours is.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from benchmarks.reward_comparison import main

    main()
