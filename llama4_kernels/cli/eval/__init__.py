"""`llama4-kernels eval`: what a server answers, against figures and against other implementations.

accuracy    lm_eval's MMLU-Pro as SGLang's guide for Llama 4 runs it, beside the guide's scores
parity      logprobs token by token, against transformers and stock SGLang
needle      a number hidden in a long text, asked back
"""
