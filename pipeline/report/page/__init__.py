"""The report as one self-contained HTML file: tables, plots, and a document viewer."""
