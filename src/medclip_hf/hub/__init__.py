"""What enters from and leaves for the Hub: conversion of official weights, cards, checks."""
