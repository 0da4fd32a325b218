"""Making data with a second model: questions, a plan over levels, prompts, a generator, checks, and a log of it all."""
