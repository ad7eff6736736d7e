"""The SGLang plugin: the only folder that imports sglang."""
