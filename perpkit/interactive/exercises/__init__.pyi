from .selection import check_mask as check_mask
