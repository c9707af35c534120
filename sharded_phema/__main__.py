"""``python -m sharded_phema``, and what ``torchrun -m sharded_phema`` starts on every rank."""

from sharded_phema.cli import main

if __name__ == "__main__":
    main()
