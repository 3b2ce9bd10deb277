"""Evaluation of a model that is there: likelihood of texts, labelled sets, benchmarks, and the page that shows them."""
