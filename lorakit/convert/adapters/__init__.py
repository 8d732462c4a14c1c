"""An adapter of any kind as plain LoRA of its base, which every engine serves right."""
