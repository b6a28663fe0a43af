from setuptools import setup

setup(
    name="grpo-vlm",
    version="0.1.0",
    description="Group Relative Policy Optimization for vision-language models, written by hand",
    license="MIT",
    python_requires=">=3.11",
    packages=["grpo", "sft", "data", "rewards"],
    # Ranges that are tested; the exact versions of the demo and the tests are in constraints.txt.
    install_requires=["torch>=2.11", "transformers>=5.8,<6", "safetensors", "pillow>=10.1", "numpy", "tokenizers"],
    extras_require={"test": ["pytest"], "benchmark": ["trl==1.16.0"]},
)
