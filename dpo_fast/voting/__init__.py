"""Serve a blind comparison page: folders of images in, people's votes in one file out."""
