"""The command `dylora`: one file a verb, imported only when that verb runs."""
