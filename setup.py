from setuptools import find_packages, setup

setup(
    name="grpo-vlm",
    version="0.1.0",
    description="Group Relative Policy Optimization for vision-language models, written by hand",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["grpo*", "sft*", "data*", "rewards*"]),
    package_data={"grpo": ["presets.json"], "grpo.report": ["page.html", "page.css", "*.js"],
                  "grpo.runtime": ["elsewhere.json"], "data": ["prompts/*.txt"],
                  "data.toy": ["checkpoint/*", "world.json"]},
    # The tests pass on torch 2.13 with transformers 5.17 and 5.23, those of the engine on 5.8; constraints.txt has what
    # the demo was measured with.
    install_requires=["torch>=2.11", "transformers>=5.8,<6", "safetensors", "pillow>=10.1", "numpy", "tokenizers"],
    extras_require={"test": ["pytest", "pytest-xdist"], "benchmark": ["trl==1.16.0", "prefix-grouper==0.0.1.post1"],
                    "tensorboard": ["tensorboard"], "peft": ["peft==0.21.2"]},
)
