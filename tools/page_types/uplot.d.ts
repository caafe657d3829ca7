// uPlot stands in the page as a global; its options are not checked.
declare const uPlot: any;
