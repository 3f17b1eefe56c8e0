"""Entry point of `python -m hf_cdl VERB ...`, the same as `hf-cdl`."""

from hf_cdl.commands.main import main

if __name__ == "__main__":
    main()
