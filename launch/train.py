"""Fine-tunes a model. See README.md, or `python launch/train.py --cfg job` for every setting."""

from d9d_lora.train.main import main

if __name__ == "__main__":
    main()
