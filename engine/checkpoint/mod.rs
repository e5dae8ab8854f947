//! safetensors folders in and out. Turns bytes into (name, tensor); knows no Qwen.
