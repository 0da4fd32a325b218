"""Records of a run -> one page of HTML that needs nothing else: no network, no script, no torch to make it."""
