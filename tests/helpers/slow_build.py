"""`python -m tests.helpers.slow_build SHARD_BYTES [FLAGS]`: the cache's door with small shards, for being killed."""

import sys

from dpo_fast import cache, caching
from dpo_fast.data.cache import store

if __name__ == "__main__":
    store.SHARD_BYTES = int(sys.argv[1])
    caching.PART_ROWS = 3
    sys.exit(cache.main(sys.argv[2:]))
