"""launch/train.py with a pause after each step, so that a test can interrupt it."""

import time

from d9d_lora.train import main, trainer

step = trainer.Trainer.train_step


def slow(self, coverage=None):
    values = step(self, coverage)
    time.sleep(0.3)
    return values


trainer.Trainer.train_step = slow

if __name__ == "__main__":
    main.main()
