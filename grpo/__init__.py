"""GRPO for vision-language models: a group is one prompt and G continuations, and no prompt is computed twice."""
