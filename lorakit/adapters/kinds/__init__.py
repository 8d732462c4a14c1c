"""Other PEFT methods whose change of a weight is a product of two factors: one module a family, `as_lora` in front."""
