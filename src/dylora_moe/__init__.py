"""DyLoRA-MoE: many LoRA experts and a router over one frozen language model."""
