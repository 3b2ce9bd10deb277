"""Serving: trained models handed to, and run through, Hugging Face's library."""
