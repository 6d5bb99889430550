"""Damaged and hostile files for every reader: `mutations` draws them, `readers` reads them, `cases` judges."""
