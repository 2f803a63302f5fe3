"""``python -m neft``."""

from neft.cli import main

if __name__ == "__main__":
    main()
