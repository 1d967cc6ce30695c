"""``python -m lowmem_db`` is the same as ``lowmem-db``."""

from lowmem_db.cli.main import main

if __name__ == "__main__":
    main()
