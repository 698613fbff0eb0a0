"""A stand-in for the Hugging Face Hub: small models and data sets under the real ids, in the real formats.

`HF_ENDPOINT` alone leads `huggingface_hub`, `transformers` and `datasets` to it.
"""
