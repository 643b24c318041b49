"""The functions of other attention libraries, answered by FlashCore."""
