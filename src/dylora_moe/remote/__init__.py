"""Run folders in buckets and on other disks: sent, checked, fetched. Knows files, not what is in them."""
