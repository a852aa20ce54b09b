"""`python -m qlora_cli`, which is what `accelerate launch -m qlora_cli` starts."""

from qlora_cli.cli import main

if __name__ == "__main__":
    main()
