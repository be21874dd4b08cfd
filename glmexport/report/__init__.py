"""The renderer of reports: one report.json becomes HTML, Markdown and JUnit, and two of them a comparison.

It computes nothing.
"""
