"""Skills: what is known of each, whether something new has come, and what to do about it. Decides, never trains."""
