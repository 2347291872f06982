"""launch/train.py that is killed with signal 9 in the middle of its second save: tensors written, directory not yet in place."""

import os
import signal

from d9d_lora.state import atomic
from d9d_lora.train import main

digest = atomic.digest
saves = 0


def die(root):
    global saves
    saves += "step_" in str(root)
    if saves == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return digest(root)


atomic.digest = die

if __name__ == "__main__":
    main.main()
