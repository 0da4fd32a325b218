"""What a terminal shows while training: figures of a run -> a panel that stays at the bottom."""
