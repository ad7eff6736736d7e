#!/bin/sh
# Serves a tiny Llama 4 through SGLang with the plugin and shows the answer beside transformers'. Arguments go to `llama4-kernels demo`.
. "$(dirname "$0")/environment.sh"
exec llama4-kernels demo "$@"
