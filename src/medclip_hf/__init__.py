"""Medical vision-language models for the Hugging Face ecosystem."""
