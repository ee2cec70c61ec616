"""`python -m peft_fast`: the peft-fast command."""

from peft_fast.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
