"""Build-time Python of FlashCore: kernel sources, the matrix of variants, and the ahead-of-time compiler."""
