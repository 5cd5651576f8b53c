"""Serving: a page to type into, and a JSON API."""
