"""`python -m dylora_moe`, which is `dylora`: for torchrun and `accelerate launch`, which start modules."""

from dylora_moe.cli.main import main

if __name__ == "__main__":
    main()
