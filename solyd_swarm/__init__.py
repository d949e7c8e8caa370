"""Serverless publish/subscribe for plain Python scripts."""
